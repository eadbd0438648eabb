//! Signs that a host's CPUs are an emulator's, so that times measured on it say nothing about real servers.
//!
//! That a host is virtual does not count: its instructions run on a real CPU.

/// Makers of real x86-64 CPUs, as CPUID leaf 0 names them (sandpile.org, "Vendor ID").
const CPU_MAKERS: &[&str] = &["GenuineIntel", "AuthenticAMD", "HygonGenuine", "CentaurHauls", "  Shanghai  "];
/// Hypervisors that run their guests on the CPU itself, as CPUID leaf 0x40000000 names them: KVM, Hyper-V,
/// VMware, Xen, bhyve, VirtualBox, ACRN. QEMU's own translation is `TCGTCGTCGTCG`.
const HYPERVISORS: &[&str] = &[
    "KVMKVMKVM",
    "Microsoft Hv",
    "VMwareVMware",
    "XenVMMXenVMM",
    "bhyve bhyve ",
    "VBoxVBoxVBox",
    "ACRNACRNACRN",
];
/// What emulators call their machines and CPUs.
const EMULATORS: &[&str] = &["Bochs", "QEMU"];

/// What a host says of itself.
#[derive(Clone, Debug, Default)]
pub struct Signs {
    /// Whether its CPUs have VMX or SVM.
    pub virtualization: bool,
    /// The CPUs' maker and model, of `/proc/cpuinfo`.
    pub cpu_vendor: String,
    /// The model.
    pub cpu_model: String,
    /// The hypervisor's signature in CPUID, if the CPUs say that there is one.
    pub hypervisor: Option<String>,
    /// The firmware's words for itself and the machine: DMI.
    pub machine: Vec<String>,
}

impl Signs {
    /// Whether they are an emulator's. In doubt they are.
    pub fn emulated(&self) -> bool {
        // A CPU without either runs our guests by interpretation if at all.
        if !self.virtualization || !CPU_MAKERS.iter().any(|maker| maker.trim() == self.cpu_vendor.trim()) {
            return true;
        }
        let named = |text: &str| EMULATORS.iter().any(|name| text.contains(name));
        if named(&self.cpu_model) {
            return true;
        }
        match self.hypervisor.as_deref() {
            // QEMU's firmware has the same words on KVM, where the CPU is real.
            Some(signature) => {
                let signature = signature.trim_end_matches('\0').trim();
                !HYPERVISORS.iter().any(|known| known.trim() == signature)
            }
            None => self.machine.iter().any(|text| named(text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signs(model: &str, hypervisor: Option<&str>, machine: &[&str]) -> Signs {
        Signs {
            virtualization: true,
            cpu_vendor: "GenuineIntel".into(),
            cpu_model: model.into(),
            hypervisor: hypervisor.map(String::from),
            machine: machine.iter().map(|text| (*text).into()).collect(),
        }
    }

    #[test]
    fn servers_and_virtual_machines_on_them_are_real() {
        let model = "Intel(R) Xeon(R) Gold 6346 CPU @ 3.10GHz";
        let server = signs(model, None, &["Dell Inc.", "PowerEdge R650"]);
        let amd = Signs { cpu_vendor: "AuthenticAMD".into(), ..server.clone() };
        // The kernel trims what it reads.
        let zhaoxin = Signs { cpu_vendor: "Shanghai".into(), ..server.clone() };
        let on_kvm = signs(model, Some("KVMKVMKVM\0\0\0"), &["QEMU", "Standard PC (Q35 + ICH9, 2009)"]);
        let on_hyper_v = signs(model, Some("Microsoft Hv"), &["Microsoft Corporation"]);
        for real in [server, amd, zhaoxin, on_kvm, on_hyper_v] {
            assert!(!real.emulated(), "{real:?}");
        }
    }

    #[test]
    fn emulators_are_recognised_by_cpuid_and_by_dmi() {
        let model = "Intel(R) Core(TM) i7-7800X CPU @ 3.50GHz";
        let bochs = signs(model, None, &["The Bochs Project", "Bochs 3.0"]);
        let tcg = signs(model, Some("TCGTCGTCGTCG"), &[]);
        let tcg_that_hides = signs(model, None, &["QEMU"]);
        let by_its_model = signs("QEMU TCG CPU version 2.5+", None, &[]);
        let unknown_hypervisor = signs(model, Some("NobodyKnows?"), &[]);
        let maker = Signs { cpu_vendor: "M5 Simulator".into(), ..signs(model, None, &[]) };
        let bare = Signs { virtualization: false, ..signs(model, None, &[]) };
        for emulated in [bochs, tcg, tcg_that_hides, by_its_model, unknown_hypervisor, maker, bare] {
            assert!(emulated.emulated(), "{emulated:?}");
        }
    }
}
