"""Demo: the whole story on drawings, without network."""
