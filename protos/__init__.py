"""The contract between coordinator and devices: .proto files and their committed stubs."""
