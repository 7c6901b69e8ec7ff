"""Repnoise."""
