//! `gestalt completions`: scripts with which a shell completes `gestalt`'s commands and flags, generated from
//! the definition of the command line.

use std::io::Write;

use anyhow::Context;
use clap::{Args, Command};
use clap_complete::Shell;

/// Arguments of `gestalt completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Prints the script of such a program; the exit code.
///
/// # Errors
/// Standard output cannot be written to.
pub fn completions(args: &CompletionsArgs, program: &Command) -> anyhow::Result<u8> {
    let mut output = std::io::stdout().lock();
    output
        .write_all(&script(args.shell, program))
        .and_then(|()| output.flush())
        .context("the completions cannot be written to standard output")?;
    Ok(0)
}

fn script(shell: Shell, program: &Command) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut shown(program), program.get_name(), &mut script);
    script
}

/// A command without what is hidden of it, which clap_complete would show.
fn shown(command: &Command) -> Command {
    let shown = Command::new(command.get_name().to_string())
        .about(command.get_about().cloned().unwrap_or_default())
        .args(command.get_arguments().filter(|arg| !arg.is_hide_set()))
        .subcommands(command.get_subcommands().filter(|command| !command.is_hide_set()).map(shown));
    match command.get_version() {
        Some(version) => shown.version(version.to_string()),
        None => shown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::tests::{commands, program};

    #[test]
    fn every_shell_knows_every_command_and_none_that_is_hidden() {
        // Each shell escapes other characters than these.
        let plain = |text: &str| text.replace(|c: char| !c.is_alphanumeric() && c != ' ' && c != '-', "");
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = plain(&String::from_utf8(script(shell, &program())).unwrap());
            for (words, about) in commands() {
                let name = words.last().unwrap();
                assert!(script.contains(name), "{shell} does not know {name}");
                // Bash shows names alone.
                let told = shell == Shell::Bash || words.len() == 1 || script.contains(&plain(&about));
                assert!(told, "{shell} does not say of {name}: {about}");
            }
            for hidden in [vmm::disk_search::COMMAND, "spawned"] {
                assert!(!script.contains(hidden), "{shell} shows {hidden}");
            }
        }
    }
}
