"""One-line use of the losses inside other libraries; each module imports its library, and nothing here is imported."""
