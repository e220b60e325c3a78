"""Protocols: how published studies asked, each under its own label."""
