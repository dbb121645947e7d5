"""Questions with known answers into figures: published metrics on local data."""
