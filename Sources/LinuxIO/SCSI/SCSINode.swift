// SCSI commands through a node of the kernel (SG_IO): only those that read.
import Block
import CLinux
import Glibc

/// A SCSI disk, or a multipath map over the paths of one, that is open as a block node.
struct SCSINode: SCSICommandPath {
    /// How long one command may take, in milliseconds.
    private static let timeoutMS: UInt32 = 20_000

    let node: Descriptor
    let unitName: String

    func execute(_ command: SCSICommand, into buffer: UnsafeMutableRawBufferPointer) throws(BlockError) -> SCSIOutcome {
        var answer = dg_scsi_answer()
        let block = command.block
        let result = dg_scsi_read(
            node.number, block, UInt8(block.count), buffer.baseAddress, UInt32(buffer.count), Self.timeoutMS, &answer)
        if result < 0 { throw BlockError(errno: -result, "\(command.name) on \(unitName) (SG_IO)") }
        let sense = withUnsafeBytes(of: answer.sense) { SCSISense(Array($0.prefix(Int(answer.sense_length)))) }
        let transferred = buffer.count - min(max(Int(answer.residual), 0), buffer.count)
        return SCSIOutcome(status: answer.status, sense: sense, transferred: transferred)
    }
}
