"""What low precision does to every layer: evidence, passes, scores, and the table of them."""
