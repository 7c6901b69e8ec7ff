"""From what was measured to what may be said: axes that were tried, claims, the verdict."""
