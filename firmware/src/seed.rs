//! The seed disk that cloud-init reads at a guest's first start: a small FAT file system labelled `CIDATA`
//! (its data source NoCloud).

use std::io::{Cursor, Write};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};

use crate::FirmwareError;

/// Bytes of the file system beside the files'.
const OVERHEAD: usize = 128 << 10;
/// The least bytes of the file system.
const LEAST: usize = 1 << 20;
const LABEL: [u8; 11] = *b"CIDATA     ";

/// A disk with files of these names and contents, in whole sectors: `user-data`, `meta-data`,
/// `network-config`.
///
/// # Errors
/// [`FirmwareError::Disk`] if FAT cannot hold them.
pub fn image(files: &[(&str, &str)]) -> Result<Vec<u8>, FirmwareError> {
    let content: usize = files.iter().map(|(_, content)| content.len()).sum();
    let len = (content + OVERHEAD).next_multiple_of(4096).max(LEAST);
    let mut bytes = vec![0; len];
    let fill = |bytes: &mut Vec<u8>| -> std::io::Result<()> {
        let options = FormatVolumeOptions::new().volume_label(LABEL);
        fatfs::format_volume(Cursor::new(&mut *bytes), options)?;
        let system = FileSystem::new(Cursor::new(&mut *bytes), FsOptions::new())?;
        for (name, content) in files {
            let mut file = system.root_dir().create_file(name)?;
            file.write_all(content.as_bytes())?;
            file.flush()?;
        }
        system.unmount()
    };
    let made = fill(&mut bytes);
    made.map_err(|error| FirmwareError::Disk(format!("the seed for cloud-init cannot be made: {error}")))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_files_are_found_under_the_label_that_cloud_init_looks_for() {
        let long = "#cloud-config\n# ".to_string() + &"x".repeat(3 << 20);
        for user_data in ["#cloud-config\n", &long] {
            let files =
                [("user-data", user_data), ("meta-data", "instance-id: a\n"), ("network-config", "n\n")];
            let bytes = image(&files).unwrap();
            assert!(bytes.len().is_multiple_of(512));
            let system = FileSystem::new(Cursor::new(bytes), FsOptions::new()).unwrap();
            assert_eq!(system.volume_label(), "CIDATA");
            assert_eq!(system.read_volume_label_from_root_dir().unwrap().as_deref(), Some("CIDATA"));
            for (name, content) in files {
                let mut text = String::new();
                system.root_dir().open_file(name).unwrap().read_to_string(&mut text).unwrap();
                assert_eq!(text, content);
            }
        }
    }
}
