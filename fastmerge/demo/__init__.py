"""The demo: a real MiniLM, six real text-classification tasks, every merging method side by side."""
