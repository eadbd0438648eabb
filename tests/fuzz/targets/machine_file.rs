//! Machine files, from any text: a machine, or an error of one line.
#![no_main]
libfuzzer_sys::fuzz_target!(|text: &str| {
    match machine::config::file::parse(text) {
        Ok(config) => drop(config.check()),
        Err(error) => assert!(!error.0.contains('\n'), "{:?}", error.0),
    }
});
