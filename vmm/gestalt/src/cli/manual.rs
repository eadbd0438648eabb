//! `gestalt man`: the manual, a page for the program and for each of its commands, generated from the
//! definition of the command line.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Command, ValueHint};
use clap_mangen::Man;

/// Arguments of `gestalt man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// The folder for gestalt.1, gestalt-run.1 and so on, such as /usr/local/share/man/man1; made if it is
    /// not there
    #[arg(value_hint = ValueHint::DirPath)]
    dir: PathBuf,
}

/// Writes the pages of such a program; the exit code.
///
/// # Errors
/// One sentence: what cannot be written.
pub fn man(args: &ManArgs, program: Command) -> anyhow::Result<u8> {
    fs::create_dir_all(&args.dir)
        .with_context(|| format!("the folder {} cannot be made", args.dir.display()))?;
    for page in pages(program) {
        let path = args.dir.join(page.get_filename());
        write(&page, &path).with_context(|| format!("the page {} cannot be written", path.display()))?;
    }
    Ok(0)
}

fn write(page: &Man, path: &Path) -> io::Result<()> {
    let mut text = Vec::new();
    page.render(&mut text)?;
    fs::write(path, text)
}

/// A page for the program, and for each of its commands and theirs.
fn pages(program: Command) -> Vec<Man> {
    fn add(command: &Command, source: &str, pages: &mut Vec<Man>) {
        let name = command.get_display_name().unwrap_or_else(|| command.get_name());
        let page = Man::new(command.clone()).title(name.to_uppercase()).source(source);
        pages.push(page.manual("Gestalt Manual"));
        let shown = command.get_subcommands().filter(|command| !command.is_hide_set());
        shown.for_each(|command| add(command, source, pages));
    }
    let mut program = program.disable_help_subcommand(true);
    program.build();
    let source = program.render_version();
    let mut pages = Vec::new();
    add(&program, source.trim(), &mut pages);
    pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::tests::{commands, program};

    /// A page without what roff escapes.
    fn text(path: &Path) -> String {
        fs::read_to_string(path).unwrap().replace("\\-", "-").replace("\\*(Aq", "'")
    }

    #[test]
    fn every_command_has_a_page_with_its_name_its_synopsis_and_its_sentence() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("share/man1");
        man(&ManArgs { dir: dir.clone() }, program()).unwrap();
        let commands = commands();
        for (words, about) in &commands {
            let page = text(&dir.join(format!("{}.1", words.join("-"))));
            let sections: Vec<_> = page.lines().filter_map(|line| line.strip_prefix(".SH ")).collect();
            assert!(["NAME", "SYNOPSIS", "DESCRIPTION"].iter().all(|name| sections.contains(name)), "{page}");
            assert!(page.contains(&format!("{} - {about}", words.join("-"))), "{about:?} is not in {page}");
            assert!(page.contains(&format!("\\fB{}\\fR", words.join(" "))), "{page}");
            assert!(page.contains(concat!("gestalt ", env!("CARGO_PKG_VERSION"))), "{page}");
        }
        // None of what is for Gestalt itself.
        assert_eq!(fs::read_dir(&dir).unwrap().count(), commands.len());
        assert!(!text(&dir.join("gestalt-node.1")).contains("--spawned"));
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let dir = file.path().join("man1");
        let said = format!("{:#}", man(&ManArgs { dir: dir.clone() }, program()).unwrap_err());
        assert!(said.contains(dir.to_str().unwrap()) && said.lines().count() == 1, "{said}");
    }
}
