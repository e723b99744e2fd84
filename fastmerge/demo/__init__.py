"""The demo: a real MiniLM and six real text-classification tasks, method beside method."""
