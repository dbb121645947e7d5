import Foundation
import Testing

@testable import MM1Kit

@Test func aDraftTakesWhatCanBeRead() throws {
    let folder = FileManager.default.temporaryDirectory
        .appendingPathComponent(UUID().uuidString)
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: folder) }
    let file = folder.appendingPathComponent("cat.png")
    try Data([1, 2]).write(to: file)

    var draft = Draft()
    #expect(!draft.isReady)
    draft.add([folder.appendingPathComponent("dog.png"), file])
    #expect(draft.pictures == [Picture(Data([1, 2]))])
    #expect(try #require(draft.problem).hasPrefix("dog.png cannot be read: "))
    draft.add([file, folder])
    #expect(draft.pictures.count == 2)
    #expect(draft.problem != nil)
    draft.remove(at: 0)
    draft.add([])
    #expect(draft.problem == nil)

    draft.text = " \n"
    #expect(!draft.isReady)
    draft.text = "What is this?"
    #expect(draft.isReady)
    let asked = draft.take()
    #expect(asked.text == "What is this?")
    #expect(asked.pictures.count == 1)
    #expect(draft.pictures.isEmpty && draft.text.isEmpty)
}
