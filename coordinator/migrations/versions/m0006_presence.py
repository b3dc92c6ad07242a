"""How many devices were there, hour by hour, and an index for a run's assignments of one status."""

import sqlalchemy as sa
from alembic import op

from pocketfed.coordinator.store import UtcDateTime

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "presence",
        sa.Column("hour", UtcDateTime(), nullable=False),
        sa.Column("devices", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("hour"),
    )
    # Whose updates a run has quarantined is asked for every round, and by every reader of the dashboard.
    op.create_index("ix_assignments_status_run_id", "assignments", ["status", "run_id"], unique=False)
    op.drop_index("ix_assignments_status", table_name="assignments")


def downgrade() -> None:
    op.create_index("ix_assignments_status", "assignments", ["status"], unique=False)
    op.drop_index("ix_assignments_status_run_id", table_name="assignments")
    op.drop_table("presence")
