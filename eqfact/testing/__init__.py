"""What does a port or a pass of your own have to keep? Laws to check, and random networks to check them on.

:mod:`eqfact.testing.laws` needs numpy only; :mod:`eqfact.testing.strategies` needs Hypothesis (the extra ``test``).
Neither is imported by the library itself.
"""
