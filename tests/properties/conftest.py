"""Examples are the same at each run, and few: a property that needs many has a test of its own."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "medxray", deadline=None, derandomize=True, max_examples=20, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("medxray")
