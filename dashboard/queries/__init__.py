"""What the dashboard asks the store: SQL in, small frozen rows out. A module a subject.

Nothing here writes, and nothing here knows Streamlit.
Counting and summing happen in SQL, and every list that grows with the fleet is a page (`limit`, `offset`), so that
10,000 devices and 1,000 rounds cost no more than what is shown. Bytes are bytes, durations are seconds, times are UTC.
"""

from pocketfed.dashboard.queries import compare, fleet, learning, models, rounds, runs, security, system

__all__ = ["compare", "fleet", "learning", "models", "rounds", "runs", "security", "system"]
