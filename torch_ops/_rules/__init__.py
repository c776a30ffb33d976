"""How a row is differentiated: autograd.Functions, analytic to every order."""
