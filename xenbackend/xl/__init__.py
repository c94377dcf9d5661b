"""The step before xl: turns disk lines, as operators write them, into lines that xl understands."""
