//! The control messages of driver and device about a named port, and their bytes (5.3.6.2).

/// The port's number; 0 would be a console.
pub const PORT: u32 = 1;

/// The driver is ready for messages.
pub const DEVICE_READY: u16 = 0;
/// There is a port.
pub const PORT_ADD: u16 = 1;
/// The driver is ready for a port.
pub const PORT_READY: u16 = 3;
/// A side uses the port, or no longer does.
pub const PORT_OPEN: u16 = 6;
/// The port's name, which follows.
pub const PORT_NAME: u16 = 7;

/// The bytes of a message about the port.
pub fn message(event: u16, value: u16) -> Vec<u8> {
    [&PORT.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// Somebody on the host uses the port, or nobody any more.
pub fn opened(open: bool) -> Vec<u8> {
    message(PORT_OPEN, open.into())
}
