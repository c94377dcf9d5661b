"""A driver that needs a package which is not there."""

import a_package_that_nobody_has  # noqa: F401 - that it fails is what it is for

Broken = None
