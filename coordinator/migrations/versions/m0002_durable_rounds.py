"""Attempts and checkpoints of rounds, an append-only history, the coordinator's lease, who is there."""

import sqlalchemy as sa
from alembic import op

from pocketfed.coordinator.store import UtcDateTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("devices", sa.Column("present_until", UtcDateTime(), nullable=True))
    op.create_index("ix_devices_channel_present_until", "devices", ["channel", "present_until"])
    op.add_column("rounds", sa.Column("attempt", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("rounds", sa.Column("cohort", sa.JSON(), nullable=True))
    op.add_column("assignments", sa.Column("counted_in", sa.Integer(), nullable=True))
    op.execute(
        "UPDATE assignments SET counted_in = round WHERE status IN ('aggregated', 'quarantined', 'failed', 'expired')"
    )
    op.create_index("ix_assignments_run_id_counted_in", "assignments", ["run_id", "counted_in"])
    op.create_index("ix_updates_digest", "updates", ["digest"])
    op.create_table(
        "checkpoints",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"]),
        sa.ForeignKeyConstraint(["state"], ["blobs.digest"]),
        sa.PrimaryKeyConstraint("run_id"),
    )
    op.create_table(
        "history",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("assignment_id", sa.String(length=64), nullable=True),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("reason", sa.String(length=500), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_history_run_id_round", "history", ["run_id", "round"])
    op.create_table(
        "leases",
        sa.Column("name", sa.String(length=20), nullable=False),
        sa.Column("holder", sa.String(length=500), nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("held_until", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )


def downgrade() -> None:
    for table in ("leases", "history", "checkpoints"):
        op.drop_table(table)
    op.drop_index("ix_updates_digest", "updates")
    op.drop_index("ix_assignments_run_id_counted_in", "assignments")
    op.drop_column("assignments", "counted_in")
    op.drop_column("rounds", "cohort")
    op.drop_column("rounds", "attempt")
    op.drop_index("ix_devices_channel_present_until", "devices")
    op.drop_column("devices", "present_until")
