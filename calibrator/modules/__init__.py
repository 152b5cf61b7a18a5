"""What policies are made of: the chain that describes any of them, and torch modules that several families share."""
