"""Steering: a direction added by degrees, and every answer taken apart."""
