//! Fuzzes the decoder of logs that are shown on a terminal.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::host::plain_text(bytes);
});
