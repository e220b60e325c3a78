"""Gates: groups of members in every mixture of clean and corrupt."""
