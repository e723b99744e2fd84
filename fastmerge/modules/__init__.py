"""Merged models that keep something of every expert: modules that compute with it per sample."""
