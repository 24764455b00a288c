"""Long proofs, run by `make accept`: each writes its figures, with the commit, to `docs/evidence/`."""
