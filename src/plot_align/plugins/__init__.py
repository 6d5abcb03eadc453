"""The term inside frameworks that build TRL's trainers themselves: one module each, and how they read its options.

Nothing here is imported by the rest of the package; a framework's module needs that framework.
"""
