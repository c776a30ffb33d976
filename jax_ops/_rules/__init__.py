"""How a row is differentiated: one function for both modes, analytic to every order."""
