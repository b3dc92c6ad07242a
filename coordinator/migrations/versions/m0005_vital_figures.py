"""Vital figures of the coordinator, and an index for what a device has open."""

import sqlalchemy as sa
from alembic import op

from pocketfed.coordinator.store import UtcDateTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "vitals",
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("calls", sa.Integer(), nullable=False),
        sa.Column("errors", sa.Integer(), nullable=False),
        sa.Column("p50_ms", sa.Double(), nullable=False),
        sa.Column("p95_ms", sa.Double(), nullable=False),
        sa.Column("p99_ms", sa.Double(), nullable=False),
        sa.Column("bytes_in", sa.BigInteger(), nullable=False),
        sa.Column("bytes_out", sa.BigInteger(), nullable=False),
        sa.Column("write_ms", sa.Double(), nullable=False),
        sa.Column("devices", sa.Integer(), nullable=False),
        sa.Column("polls", sa.Integer(), nullable=False),
        sa.Column("queue", sa.Integer(), nullable=False),
        sa.Column("spool_files", sa.Integer(), nullable=False),
        sa.Column("spool_bytes", sa.BigInteger(), nullable=False),
        sa.Column("rss_bytes", sa.BigInteger(), nullable=False),
        sa.Column("open_files", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("at"),
    )
    # A device that has taken part in a thousand rounds has one assignment open: its others are not to be read.
    op.create_index("ix_assignments_device_id_status", "assignments", ["device_id", "status"], unique=False)
    op.drop_index("ix_assignments_device_id", table_name="assignments")


def downgrade() -> None:
    op.create_index("ix_assignments_device_id", "assignments", ["device_id"], unique=False)
    op.drop_index("ix_assignments_device_id_status", table_name="assignments")
    op.drop_table("vitals")
