"""The front step before xl: disk lines as operators write them become lines that xl understands."""
