//! The places of the sockets of this user's machines: in a folder that only the user can enter, named after
//! the machine.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

/// How a socket's name ends.
const END: &str = ".sock";

/// Names another folder.
pub const FOLDER: &str = "GESTALT_RUN_DIR";

/// The folder: what [`FOLDER`] says, or else `/run/gestalt` for root, and for others `gestalt` in
/// `$XDG_RUNTIME_DIR` or `/tmp/gestalt-UID`. (Root's does not depend on whether it is a session, a service or
/// `sudo` that asks.)
pub fn folder() -> PathBuf {
    let user = Uid::effective();
    let given = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|dir| dir.is_absolute());
    match (given(FOLDER), given("XDG_RUNTIME_DIR")) {
        (Some(folder), _) => folder,
        _ if user.is_root() => "/run/gestalt".into(),
        (None, Some(folder)) => folder.join("gestalt"),
        (None, None) => format!("/tmp/gestalt-{user}").into(),
    }
}

/// The socket of a machine in a folder.
pub fn socket(folder: &Path, machine: &str) -> PathBuf {
    folder.join(format!("{machine}{END}"))
}

/// The machines that have a socket in a folder, by name. Not all of them need run.
pub fn machines(folder: &Path) -> Vec<String> {
    let name = |entry: fs::DirEntry| Some(entry.file_name().to_str()?.strip_suffix(END)?.to_owned());
    let mut names: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().filter_map(name).collect();
    names.sort();
    names
}

/// Makes the folder, if it is not there.
///
/// # Errors
/// It cannot be made, or others than this user can enter it.
pub fn make(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    // Somebody else may have made it, or a link to elsewhere, where everybody may write.
    let found = fs::symlink_metadata(folder)?;
    if !found.is_dir() || found.uid() != Uid::effective().as_raw() || found.mode() & 0o077 != 0 {
        return Err(io::Error::other(format!(
            "{} is open to others: remove it, or `chmod 700` it if it is yours",
            folder.display()
        )));
    }
    Ok(())
}

/// Keeps others from making and removing sockets in the folder for as long as the file is open.
///
/// # Errors
/// What the system says.
pub fn lock(folder: &Path) -> io::Result<File> {
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(folder.join("lock"))?;
    file.lock()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_folder_that_others_can_enter_is_refused() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("a");
        make(&folder).unwrap();
        make(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o750)).unwrap();
        assert!(make(&folder).unwrap_err().to_string().contains("chmod 700"));
        let link = outer.path().join("b");
        std::os::unix::fs::symlink(outer.path(), &link).unwrap();
        assert!(make(&link).is_err());
    }

    #[test]
    fn machines_are_found_by_their_sockets() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.sock", "a.sock", "c"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(machines(folder.path()), ["a", "b"]);
        assert!(machines(&folder.path().join("none")).is_empty());
    }
}
