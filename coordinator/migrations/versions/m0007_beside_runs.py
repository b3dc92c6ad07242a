"""What a run is compared with, where an update pointed, and what kind of device a device says it is."""

import sqlalchemy as sa
from alembic import op

from pocketfed.coordinator.store import UtcDateTime

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "baselines",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("metric", sa.String(length=100), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"]),
        sa.PrimaryKeyConstraint("run_id", "kind", "metric"),
    )
    op.add_column("updates", sa.Column("cosine", sa.Double(), nullable=True))
    op.add_column("devices", sa.Column("tier", sa.String(length=50), nullable=True))


def downgrade() -> None:
    op.drop_column("devices", "tier")
    op.drop_column("updates", "cosine")
    op.drop_table("baselines")
