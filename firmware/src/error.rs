//! Errors in a machine's description or its kernel, as sentences for the operator.

/// An error of the firmware crate.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// The machine's description makes no sense.
    #[error("{0}")]
    Spec(String),
    /// The kernel or initrd cannot be loaded.
    #[error("{0}")]
    Boot(String),
    /// There is no kernel on a disk.
    #[error("{0}")]
    Disk(String),
}
