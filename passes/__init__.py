"""FX passes: find attention sites, recognise their cache idiom, rewrite, desugar."""
