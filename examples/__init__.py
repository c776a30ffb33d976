"""The demo: one small language model, two frameworks, three losses (`python -m examples.demo`)."""
