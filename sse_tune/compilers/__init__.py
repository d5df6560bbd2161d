"""What turns one launch of a template into machine code: one module for each compiler, and what they have in common."""
