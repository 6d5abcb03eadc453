"""What the package is compared with: slow, obvious, and sharing no code with what it checks."""
