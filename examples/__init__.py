"""Files to copy from, and the demo: one small language model, two frameworks, three losses (`examples.demo`)."""
