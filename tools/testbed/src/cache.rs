//! A directory of things that are slow to make, each keyed by the recipe it was made from.
//!
//! ```text
//! <cache>/<name>-<hash of recipe>/      a finished entry; appears by one rename, never half made
//! <cache>/<name>-<hash>.lock            held while it is being made, so that two builders do not race
//! <cache>/.building-<name>-<hash>/      being made; left behind only by a killed builder, cleared by the next
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

/// Entries of an outdated recipe are removed when nobody used them for this long.
const KEEP_OUTDATED: Duration = Duration::from_secs(7 * 24 * 3600);
/// File in an entry whose modification time says when it was last used.
const USED: &str = ".used";

/// The cache directory.
pub struct Cache {
    root: PathBuf,
    /// Set when no lasting directory can be had: everything is made again and forgotten at the end.
    _temporary: Option<tempfile::TempDir>,
}

impl Cache {
    /// Opens `$GESTALT_CACHE`, else `$XDG_CACHE_HOME/gestalt`, else `~/.cache/gestalt`, else a temporary
    /// directory.
    ///
    /// # Errors
    /// `$GESTALT_CACHE` is set but cannot be made, or there is not even a temporary directory.
    pub fn open() -> Result<Self> {
        if let Some(root) = std::env::var_os("GESTALT_CACHE").map(PathBuf::from) {
            fs::create_dir_all(&root).with_context(|| {
                format!("GESTALT_CACHE={}: cannot make it; name a writable directory", root.display())
            })?;
            return Self::at(root);
        }
        let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let base = base.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
        if let Some(root) = base.map(|base| base.join("gestalt")) {
            if fs::create_dir_all(&root).is_ok() && tempfile::tempfile_in(&root).is_ok() {
                return Self::at(root);
            }
            eprintln!("{} is not writable: nothing will be cached", root.display());
        }
        let temporary = tempfile::Builder::new().prefix("gestalt-cache-").tempdir()?;
        Ok(Self { root: temporary.path().to_owned(), _temporary: Some(temporary) })
    }

    /// Opens the cache in `root`, which exists.
    ///
    /// # Errors
    /// `root` cannot be resolved.
    pub fn at(root: PathBuf) -> Result<Self> {
        Ok(Self { root: root.canonicalize()?, _temporary: None })
    }

    /// The directory of entry `name` made from `recipe`; `build` fills an empty directory when there is none
    /// yet.
    ///
    /// # Errors
    /// Those of `build`, which leave no entry behind, and those of the file system.
    pub fn entry(
        &self,
        name: &str,
        recipe: &str,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let key = format!("{name}-{}", hash(recipe));
        let finished = self.root.join(&key);
        if finished.is_dir() {
            touch(&finished);
            return Ok(finished);
        }
        let lock = File::create(self.root.join(format!("{key}.lock")))?;
        let _lock = match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((lock, _)) => {
                eprintln!("waiting for another process that is making {name}");
                Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?
            }
        };
        if finished.is_dir() {
            return Ok(finished);
        }
        let building = self.root.join(format!(".building-{key}"));
        if building.exists() {
            fs::remove_dir_all(&building)?;
        }
        fs::create_dir(&building)?;
        let made = build(&building).with_context(|| format!("making {name}"));
        if let Err(error) = made {
            // Best effort: the next builder clears it if this does not succeed.
            let _ = fs::remove_dir_all(&building);
            return Err(error);
        }
        fs::write(building.join("recipe"), recipe)?;
        touch(&building);
        fs::rename(&building, &finished)?;
        self.prune(name, &finished);
        Ok(finished)
    }

    /// Removes entries of `name` other than `current` that nobody used lately.
    fn prune(&self, name: &str, current: &Path) {
        let Ok(entries) = fs::read_dir(&self.root) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            let Some(file) = path.file_name().and_then(|file| file.to_str()) else { continue };
            let of_this_name = file.rsplit_once('-').is_some_and(|(stem, _)| stem == name);
            let used = fs::metadata(path.join(USED)).and_then(|meta| meta.modified());
            let old =
                used.is_ok_and(|at| SystemTime::now().duration_since(at).unwrap_or_default() > KEEP_OUTDATED);
            if of_this_name && path != current && old {
                let _ = fs::remove_dir_all(&path);
                let _ = fs::remove_file(path.with_file_name(format!("{file}.lock")));
            }
        }
    }
}

/// Notes that an entry is in use. Best effort: a read-only cache serves as well.
fn touch(entry: &Path) {
    let _ = File::create(entry.join(USED));
}

/// The first 16 hexadecimal digits of the SHA-256 of `recipe`.
fn hash(recipe: &str) -> String {
    Sha256::digest(recipe.as_bytes()).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().to_owned()).unwrap();
        (dir, cache)
    }

    #[test]
    fn an_entry_is_built_once_for_one_recipe() {
        let (_dir, cache) = cache();
        let mut builds = 0;
        for _ in 0..2 {
            let entry = cache.entry("thing", "recipe one", |dir| {
                builds += 1;
                Ok(fs::write(dir.join("content"), "x")?)
            });
            assert_eq!(fs::read_to_string(entry.unwrap().join("content")).unwrap(), "x");
        }
        assert_eq!(builds, 1);
    }

    #[test]
    fn another_recipe_makes_another_entry() {
        let (_dir, cache) = cache();
        let one = cache.entry("thing", "one", |_| Ok(())).unwrap();
        let two = cache.entry("thing", "two", |_| Ok(())).unwrap();
        assert_ne!(one, two);
    }

    #[test]
    fn a_failed_build_leaves_nothing_and_can_be_repeated() {
        let (_dir, cache) = cache();
        assert!(cache.entry("thing", "r", |_| anyhow::bail!("no")).is_err());
        let entry = cache.entry("thing", "r", |dir| Ok(fs::write(dir.join("content"), "")?)).unwrap();
        assert!(entry.join("content").exists());
    }

    #[test]
    fn what_a_killed_builder_left_is_cleared() {
        let (dir, cache) = cache();
        let left = dir.path().join(format!(".building-thing-{}", hash("r")));
        fs::create_dir(&left).unwrap();
        fs::write(left.join("half"), "").unwrap();
        let entry = cache.entry("thing", "r", |_| Ok(())).unwrap();
        assert!(!entry.join("half").exists());
    }

    #[test]
    fn only_outdated_entries_of_the_same_name_are_pruned() {
        let (_dir, cache) = cache();
        let old = cache.entry("thing", "old", |_| Ok(())).unwrap();
        let other = cache.entry("other-thing", "old", |_| Ok(())).unwrap();
        let long_ago = SystemTime::now() - KEEP_OUTDATED * 2;
        for entry in [&old, &other] {
            File::options().write(true).open(entry.join(USED)).unwrap().set_modified(long_ago).unwrap();
        }
        let new = cache.entry("thing", "new", |_| Ok(())).unwrap();
        assert!(!old.exists() && other.exists() && new.exists());
    }
}
