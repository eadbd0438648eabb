//! This process's own terminal, while a job far away uses it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::termios::{self, BaudRate, SetArg, Termios};

use crate::host::Input;

/// The terminal in raw mode; restored when dropped.
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Every key goes to the job, Ctrl-C included.
    ///
    /// # Errors
    /// Standard input is not a terminal.
    pub fn enter() -> Result<Self> {
        let before = termios::tcgetattr(io::stdin()).context("standard input is not a terminal")?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Fails only if the terminal is gone.
        let _ = termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.before);
    }
}

/// Opens a serial line for bytes as they are, as fast as it can.
///
/// # Errors
/// It cannot be opened, or is no serial line.
pub fn open_serial(path: &Path) -> Result<File> {
    let line = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path);
    let line = line.with_context(|| format!("opening {}", path.display()))?;
    let mut settings =
        termios::tcgetattr(&line).with_context(|| format!("{} is no serial line", path.display()))?;
    termios::cfmakeraw(&mut settings);
    termios::cfsetspeed(&mut settings, BaudRate::B115200)?;
    termios::tcsetattr(&line, SetArg::TCSANOW, &settings)?;
    Ok(line)
}

/// Feeds this process's standard input to a job, on a thread that ends with the process.
pub fn forward_input(input: Input) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            match io::stdin().lock().read(&mut buffer) {
                Ok(0) | Err(_) => return input.end(),
                Ok(count) if input.send(&buffer[..count]).is_err() => return,
                Ok(_) => {}
            }
        }
    });
}

/// Rows and columns of the terminal on standard output, if there is one.
pub fn size() -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize to the given address, which is valid for the call.
    let result = unsafe { libc::ioctl(io::stdout().as_raw_fd(), libc::TIOCGWINSZ, &mut size) };
    (result == 0 && size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}
