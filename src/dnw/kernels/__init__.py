"""Native code that training runs on, and what stands in for it where the package was installed without a C compiler."""
