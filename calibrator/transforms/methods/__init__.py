"""Transforms, one module each; each exports `TRANSFORM`."""
