"""Ray: where the plain objects run. The only package that imports ray."""
