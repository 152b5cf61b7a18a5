"""Flow-matching policies (pi0, pi0.5): a vision-language prefix, and an expert that denoises an action chunk."""
