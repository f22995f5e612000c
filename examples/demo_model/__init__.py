"""A small, real LLaVA-1.5 that looks at drawn scenes: drawing, training, export and evaluation."""
