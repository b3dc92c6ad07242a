"""Releases in stages: who gets one, how it fares there, and what it came to be."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from pocketfed.coordinator.store import UtcDateTime

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def _columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("state", sa.String(length=20), nullable=False, server_default="live"),
        sa.Column("percent", sa.Double(), nullable=False, server_default="100"),
        sa.Column("parent_id", sa.Integer(), nullable=True),
        sa.Column("undoes_id", sa.Integer(), nullable=True),
        sa.Column("margin", sa.Double(), nullable=False, server_default="0"),
        sa.Column("loss_margin", sa.Double(), nullable=False, server_default="0"),
        sa.Column("min_devices", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("automatic", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("min_sdk", sa.String(length=20), nullable=False, server_default=sa.text("''")),
        sa.Column("max_sdk", sa.String(length=20), nullable=False, server_default=sa.text("''")),
    ]


def upgrade() -> None:
    for column in _columns():
        op.add_column("releases", column)
    op.execute(
        "UPDATE releases SET state = 'superseded' WHERE id NOT IN (SELECT max(id) FROM releases GROUP BY channel)"
    )
    op.add_column("devices", sa.Column("release_id", sa.Integer(), nullable=True))
    op.add_column("signatures", sa.Column("withheld_for", sa.Integer(), nullable=True))
    op.create_table(
        "release_reports",
        sa.Column("release_id", sa.Integer(), nullable=False),
        sa.Column("device_id", sa.Integer(), nullable=False),
        sa.Column("before_id", sa.Integer(), nullable=False),
        sa.Column("cohort", sa.String(length=100), nullable=True),
        sa.Column("examples", sa.Integer(), nullable=False),
        sa.Column("correct", sa.Integer(), nullable=False),
        sa.Column("correct_before", sa.Integer(), nullable=False),
        sa.Column("loss_sum", sa.Double(), nullable=False),
        sa.Column("loss_sum_before", sa.Double(), nullable=False),
        sa.Column("went_back", sa.Boolean(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"]),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"]),
        sa.PrimaryKeyConstraint("release_id", "device_id"),
    )
    op.create_table(
        "release_events",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("release_id", sa.Integer(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("percent", sa.Double(), nullable=False),
        sa.Column("who", sa.String(length=120), nullable=False),
        sa.Column("reason", sa.String(length=500), nullable=False),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_release_events_release_id", "release_events", ["release_id"], unique=False)


def downgrade() -> None:
    op.drop_table("release_events")
    op.drop_table("release_reports")
    op.execute("DELETE FROM signatures WHERE withheld_for IS NOT NULL")  # the older schema would hand them out
    # ... and give to everybody what is newer than what is live: stages, also those that have ended.
    op.execute(
        "DELETE FROM releases WHERE state IN ('staged', 'paused') OR id > (SELECT MAX(live.id) FROM releases AS live "
        "WHERE live.channel = releases.channel AND live.state = 'live')"
    )
    op.drop_column("signatures", "withheld_for")
    op.drop_column("devices", "release_id")
    for column in _columns():
        op.drop_column("releases", column.name)
