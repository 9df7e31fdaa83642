"""fastinstance inside other frameworks; each module needs its framework (see docs/integrations.md)."""
