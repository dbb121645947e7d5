import Foundation
import Testing

@testable import MM1Kit

private let stream = """
    data: {"a": 1}\n
    : still here\n
    event: other\r\nid: 7\r\ndata:two\r\ndata:  lines\r\n\r\n\
    data\n\n\
    data: Gr\u{fc}\u{df}e \u{1F355}\r\r\
    data: [DONE]\n\ndata: never ended
    """
private let events = [#"{"a": 1}"#, "two\n lines", "", "Gr\u{fc}\u{df}e \u{1F355}", "[DONE]"]

@Test func eventsAreTheSameWhereverTheirBytesAreCut() {
    let bytes = Array(stream.utf8)
    for cut in 0...bytes.count {
        var parser = EventParser()
        let found = parser.push(bytes[..<cut]) + parser.push(bytes[cut...])
        #expect(found.map { String(decoding: $0, as: UTF8.self) } == events, "cut at \(cut)")
    }
}

@Test func eventsAreTheSameByteByByte() {
    var parser = EventParser()
    let found = stream.utf8.flatMap { parser.push([$0]) }
    #expect(found.map { String(decoding: $0, as: UTF8.self) } == events)
}

@Test func fieldsThatOnlyBeginLikeDataAreNone() {
    var parser = EventParser()
    #expect(parser.push("database: x\n\ndat: y\n\n".utf8).isEmpty)
}

@Test func linesAreTheSameWhereverTheirBytesAreCut() {
    let bytes = Array("one\n\ntw\u{f6}\nlast".utf8)
    for cut in 0...bytes.count {
        var splitter = LineSplitter()
        let found = splitter.push(bytes[..<cut]) + splitter.push(bytes[cut...])
        #expect(found == ["one", "", "tw\u{f6}"])
        #expect(splitter.last == "last")
    }
}

@Test func aLineWithoutEndIsCut() {
    var splitter = LineSplitter()
    let found = splitter.push([UInt8](repeating: 65, count: 2 * LineSplitter.longest + 3))
    #expect(found.map(\.count) == [LineSplitter.longest, LineSplitter.longest])
    #expect(splitter.last == "AAA")
}
