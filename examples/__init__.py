"""The demo: one small language model, two frameworks, two losses (`python -m examples.demo`)."""
