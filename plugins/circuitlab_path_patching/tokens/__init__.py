"""Token ablation."""
